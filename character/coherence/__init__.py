"""Of two methods' answers, which fits the character better?"""
