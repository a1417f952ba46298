"""Which traits does a model prefer, before and after training?"""
