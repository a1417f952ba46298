"""Does the character hold when it is asked to go?"""
