"""How good generated answers are. Functions of texts alone; imports neither torch nor transformers.

``judge.score`` judges one set of answers, ``compare.compare`` two sets to the same prompts.
"""
