"""The paper's figures about hidden states, on data that needs no download: one file per figure.

Each has ``METHODS``, the ways to train that it compares, and ``make``, which trains, measures and draws. The command is
``manifold-mixup figure`` (``cli/figure.py``).
"""
