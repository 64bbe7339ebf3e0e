"""Attention calls: how one is written down, and what computes it in the end.

operators          the two graph nodes that stand for a call and its mask between capture and lowering
recorded           the function and the settings behind such a node; `closures` carries what they hold into the step
masks              a mask function of transformers, read as the few words that describe its pattern
mask_making        the mask of the model's implementation, made of that description once a step
implementations    the functions that a call is lowered to, on this rank's heads
"""
