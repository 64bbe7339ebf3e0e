"""Capture: a model and a call of it become one flat graph.

capture, exporting             the trace, and the call of torch.export beneath it
recording, recording_masks     attention calls and masks are written down on the way, not computed
trace_settings, stand_ins      what is set otherwise for the time of a trace, and put back
branches, fallbacks            a branch on data is followed on one side; what does not trace is tried otherwise
culprits, narrowing            modules that no trace can follow are found: by where it stops, or from whole layers down
candidates, places             which modules those may be; where, and in which line, a trace stopped
opaque, learning               such a module is made one node, and what it returns is learnt by running it
opaque_calls                   the calls of those as data
buffer_writes                  what a forward writes to buffers, left out where it is no state
in_place                       operations in place become operations that are not

What a trace would lose without a word is refused by `custom_backward`, `linearity`, `gradless_writes` and
`host_randomness`.
"""
