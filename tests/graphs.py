"""torch_geometric and tensordict, whose imports warn about themselves."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from tensordict import TensorDict, tensorclass
    from torch_geometric.data import Batch, Data, HeteroData
    from torch_geometric.loader import DataLoader as GraphLoader
    from torch_geometric.nn import GCNConv, global_mean_pool

__all__ = [
    "Batch", "Data", "GCNConv", "GraphLoader", "HeteroData", "TensorDict", "global_mean_pool", "tensorclass",
]  # fmt: skip
