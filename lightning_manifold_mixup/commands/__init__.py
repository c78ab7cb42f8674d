"""What `manifold-mixup` does beside fit, validate, test and predict: one file per command, each with `main(args)`."""

COMMANDS = {
    "compare": "train with no mixup, input mixup and Manifold Mixup on the same seeds; table and chart",
    "figure": "draw one of the paper's figures on spirals or digits: spirals, bottleneck, spectrum",
    "layers": "table of a network's layers: which are eligible for mixing, which are chosen, and why",
    "recipes": "list the packaged recipes with the published numbers; `recipes show NAME` prints one",
}
"""Each command's name (also its module's) and what it does, in a line."""
