"""Proof: a model whole and sharded, side by side.

comparison             how far loss, outputs and every unscaled gradient are apart
ranks                  processes joined by gloo, started once
forked, simulation     ranks that share a capture: forks of the process that made it, or threads of this one
staging                collectives replaced: by simulated ones, or by a way through the host for ranks that share a GPU
trial                  one tiny model and one kind of input (`batches`), whole and on P ranks
verify                 `surgery verify`: one architecture, every kind of input
sweep, coverage        every architecture (`catalog`), and the page that is left of it
shrink                 a configuration made small; `layer_kinds` and `oddities` keep it valid
"""
