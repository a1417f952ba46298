"""Is the character there when the plain model has answered first?"""
