"""Rewritten graphs as methods of the model: kept by signature, found for a call, run on live parameters.

programs        the graphs of one model: the one that serves a call is found, or captured
program         one of them
segments        parts that run inside the call of the module they were traced in; `checkpointing` runs them again
state           what a graph takes for granted about the model, checked before every call
installation    the model's forward is put in and taken back
"""
