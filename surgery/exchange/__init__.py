"""Exchanges: the all-to-alls around an attention call, and who attends with what.

head_plan, heads      heads are dealt out to ranks; sequence shards become head shards, and back
cross                 the same where keys and values are of another sequence than queries
row_plan, rows        with more ranks than heads the ranks of one head share its queries, if `row_sharing` lets them
own_heads, own_rows   what else a call is given (sinks, biases, masks), cut to the heads and rows of this rank
"""
