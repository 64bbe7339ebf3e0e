"""What people look at: the report, and the graph layer by layer.

report          the report; `summary` is its data, `summarize` gathers them, `tables` show them
costs           what is communicated, read off the graph; `operations` counts how everything else runs
printing        the graph; `sections` and `layers` put what repeats in one place, `layout` sets the columns
listing         one value as a line; `notation` writes its sizes in letters; `text` makes plain text of it all
"""
