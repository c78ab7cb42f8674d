"""Whole models and routines of other packages: with the labels inside, and with augmentations of their own."""

import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_manifold_mixup import ManifoldMixupCallback, mixing
from tests.exactness import train

TOKENS = 20


class Wrapped(L.LightningModule):
    """A model that takes the labels and returns the loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


SMALL = {"d_model": 8, "dropout": 0.0, "vocab_size": TOKENS, "pad_token_id": 0, "decoder_start_token_id": 0}


def t5():
    sizes = {"d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**(SMALL | sizes)))


def bart():
    sizes = {"attention_dropout": 0.0, "activation_dropout": 0.0, "max_position_embeddings": 16}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 16}
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(**(SMALL | sizes), bos_token_id=1, eos_token_id=2, forced_eos_token_id=2)
    )


def bert():
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(vocab_size=TOKENS, max_position_embeddings=16, num_labels=3, **sizes, **drops)
    return transformers.BertForSequenceClassification(config)


MODELS = {
    "T5": (t5, "model.encoder.block.1.layer.1"),
    "BART": (bart, "model.model.encoder.layers.0"),
    "BERT": (bert, "model.bert.encoder.layer.0"),
}


@pytest.mark.parametrize("name", MODELS)
def test_labels_inside(name):
    """Teacher forcing after layer k: the decoder of each labelling sees its own labels."""
    make, layer = MODELS[name]
    model = make().double()
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (4,), generator=generator)
    if name != "BERT":
        labels = torch.randint(3, TOKENS, (4, 5), generator=generator)
    ids = torch.randint(3, TOKENS, (4, 6), generator=generator)
    rows = [{"input_ids": ids[i], "labels": labels[i]} for i in range(4)]
    module = Wrapped(model)
    callback = ManifoldMixupCallback(layers=[layer], seed=0)
    [(draw, weights, value, grads)], _ = train(module, DataLoader(rows, 4), callback)
    twin = copy.deepcopy(module)
    twin.load_state_dict(weights, strict=False)
    total = 0.0
    for weight, chosen in ((draw.mix.lam.double(), labels), (1 - draw.mix.lam.double(), labels[draw.mix.partners])):
        with mixing(twin.get_submodule(layer), draw.mix):
            total = total + weight * twin.model(input_ids=ids, labels=chosen).loss
    torch.testing.assert_close(value.double(), total.detach())
    wanted = torch.autograd.grad(total, list(twin.parameters()), allow_unused=True)
    for (name, _), grad in zip(twin.named_parameters(), wanted, strict=True):
        if grad is not None:
            torch.testing.assert_close(grads[name], grad, rtol=1e-6, atol=1e-8, msg=name)


class Conditional(L.LightningModule):
    """A decoder after layer k that is conditioned on the labels, with dropout: one state, two labellings."""

    def __init__(self):
        super().__init__()
        self.encoder, self.classes = nn.Linear(6, 8).double(), nn.Embedding(5, 8).double()
        self.decoder = nn.Sequential(nn.Tanh(), nn.Linear(8, 5)).double()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.decoder(self.encoder(x) + self.classes(y)), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def test_class_conditional_head():
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(5, (8,))
    module = Conditional()
    callback = ManifoldMixupCallback(layers=["encoder"], seed=0)
    [(draw, weights, value, _)], _ = train(module, DataLoader(TensorDataset(x, y), 8), callback)
    module.load_state_dict(weights)
    h = draw.mix(module.encoder(x))
    expected = 0.0
    for weight, labels in ((draw.mix.lam.double(), y), (1 - draw.mix.lam.double(), y[draw.mix.partners])):
        expected = expected + weight * F.cross_entropy(module.decoder(h + module.classes(labels)), labels)
    torch.testing.assert_close(value, expected.detach())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["classification", "segmentation"])
def test_torch_uncertainty(kind):
    """Its routines carry a mixup of their own, a module without weights that is handed inputs and labels."""
    from torch_uncertainty import routines  # it warns when it is imported

    torch.manual_seed(0)
    images = torch.randn(8, 3, 8, 8)
    if kind == "classification":
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 4))
        routine = routines.ClassificationRoutine(model=model, num_classes=4, loss=nn.CrossEntropyLoss())
        labels, tail, head = torch.randint(4, (8,)), model[2:], model[:2]
    else:
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1))
        routine = routines.SegmentationRoutine(model=model, num_classes=4, loss=nn.CrossEntropyLoss())
        labels, tail, head = torch.randint(4, (8, 8, 8)), model[2:], model[:2]
    routine.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), 0.01)
    callback = ManifoldMixupCallback(layers=["model.1"], seed=0)
    [(draw, weights, value, _)], _ = train(routine, DataLoader(TensorDataset(images, labels), 8), callback)
    model.load_state_dict({n.removeprefix("model."): v for n, v in weights.items() if n.startswith("model.")})
    logits = tail(draw.mix(head(images)))
    lam, partners = draw.mix.lam, draw.mix.partners
    expected = lam * F.cross_entropy(logits, labels) + (1 - lam) * F.cross_entropy(logits, labels[partners])
    torch.testing.assert_close(value, expected.detach())
