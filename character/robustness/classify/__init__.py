"""Which persona does an answer read as?"""
