"""Bytes that nobody well-meaning sends, to everything of netapply's that takes bytes: the rig of `make fuzz`.

A target is a function of an input; an input is one or more pieces of bytes. It may refuse by the errors that its
contract names, and do nothing else: no other exception, no answer that contradicts itself, no long time.
"""
