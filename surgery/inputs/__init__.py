"""What a call is given: which graph it belongs to, and whether it can be answered exactly.

signature         what a graph is captured for: the inputs that are present, their dtypes, the model's mode
examples          the call that `transform` captures first
checks            refusals before anything runs
agreement         whether the ranks of a group were given the same
sharded_inputs    batches that a loader has already cut
images            images become embeddings in front of the graph
"""
