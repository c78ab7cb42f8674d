"""Random training steps: programs of a few statements that take a loss of logits and labels, as source code.

Each statement reads variables that are there and makes a new one. The names tell the kind: `z` logits (n, C), `v` one
float for each sample, `m` one bool for each sample, `y` labels, `w` one float for each class, `t` a (C, C) table,
`a` a number on the host, `l` a 0-d tensor.
"""

import random

CLASSES = 5

# (kind of the result, source); {z}, {y}, ... is a variable of that kind, {o} the result, {c} a constant.
STATEMENTS = [
    # tensor operations
    ("z", "{o} = {z} * {c} + {z}.tanh()"),
    ("z", "{o} = {z}.log_softmax(1)"),
    ("z", "{o} = {z} + F.one_hot({y}, C) * {c}"),
    ("z", "{o} = {z} * {w}"),
    ("z", "{o} = {z} + {t}[{y}]"),
    ("z", "{o} = torch.where({m}[:, None], {z}, {z} * {c})"),
    ("z", "{o} = {z} @ {t}"),
    ("z", "{o} = {z}.scatter(1, {y}[:, None], {c})"),
    ("z", "{o} = {z}.scatter_add(1, {y}[:, None], {v}[:, None])"),
    ("z", "{o} = {z}.masked_fill(F.one_hot({y}, C).bool(), {c})"),
    ("v", "{o} = F.cross_entropy({z}, {y}, reduction='none')"),
    ("v", "{o} = F.cross_entropy({z}, {y}, reduction='none', label_smoothing=0.1)"),
    ("v", "{o} = {z}.gather(1, {y}[:, None])[:, 0]"),
    ("v", "{o} = {z}[torch.arange(len({z})), {y}]"),
    ("v", "{o} = {w}[{y}] * {v}"),
    ("v", "{o} = {v} * ({y} == {k})"),
    ("v", "{o} = {v}.where({m}, {v} * {c})"),
    ("v", "{o} = {v}.pow(2) - {v}.mean()"),
    ("v", "{o} = {v} / (1 + {m}.sum())"),
    ("v", "{o} = {v}.clamp(max={c})"),
    ("v", "{o} = ({y} * {v}).sin()"),
    ("v", "{o} = {z}.max(dim=1).values - {z}.gather(1, {y}[:, None]).squeeze(1)"),
    ("v", "{o} = {z}.topk(2, dim=1).values[:, 1]"),
    ("v", "{o} = torch.stack([({y} == k) * {v} for k in range(C)]).sum(0)"),
    ("v", "{o} = torch.einsum('ij,ij->i', {z}, F.one_hot({y}, C).to({z}))"),
    ("m", "{o} = {y} == {z}.argmax(1)"),
    ("m", "{o} = {v}.detach() > {c}"),
    ("m", "{o} = {y} != {k}"),
    ("m", "{o} = {m} & ({y} % 2 == 0)"),
    ("m", "{o} = ~{m}"),
    ("m", "{o} = torch.isin({y}, torch.tensor([0, {k}]))"),
    ("y", "{o} = ({y} + {k}) % C"),
    ("y", "{o} = {z}.argmax(1)"),
    ("y", "{o} = torch.where({m}, {y}, {k})"),
    ("y", "{o} = {y}.clone(); {o}[{m}] = {k}"),
    ("y", "{o} = {y}.clamp(max={k})"),
    ("y", "{o} = {y}.view(-1, 1).expand(-1, 2).max(1)[0]"),
    ("w", "{o} = 1 + F.one_hot({y}, C).sum(0)"),
    ("w", "{o} = torch.bincount({y}, minlength=C).double() / len({y})"),
    ("w", "{o} = {w} / {w}.abs().sum()"),
    ("w", "{o} = torch.zeros(C, dtype=F64).index_add(0, {y}, {v})"),
    ("t", "{o} = F.one_hot({y}, C).double().T @ {z}"),
    ("t", "{o} = {t} * {c} + {t}.T"),
    # in-place writes
    ("z", "{o} = {z}.clone(); {o}[torch.arange(len({y})), {y}] -= {c}"),
    ("z", "{o} = {z}.clone(); {o}[{m}] = {c}"),
    ("z", "{o} = {z}.clone(); {o}[{m}] *= {c}"),
    ("z", "{o} = {z} * 1; {o}.scatter_(1, {y}[:, None], {c})"),
    ("z", "{o} = {z} * 1; {o}.view(-1)[torch.arange(len({y})) * C + {y}] = {c}"),
    ("z", "{o} = {z} * 1; p = {o}.flatten(); p[{y}.cumsum(0) * 0 + {k}] = {c}"),
    ("z", "{o} = torch.zeros_like({z}); q = {o}.T; {o}.scatter_(1, {y}[:, None], 1); {o} = {o} * {z} + q.T"),
    ("v", "{o} = {v} * 1; {o} *= {m}; {o} += {c}"),
    ("v", "{o} = {v} * 1; {o}[{y} == {k}] = 0"),
    ("v", "{o} = {v} * 1; torch.mul({o}, {w}[{y}], out=None); {o}.mul_({w}[{y}])"),
    ("w", "{o} = torch.ones(C, dtype=F64); {o}.index_add_(0, {y}, {v}.detach())"),
    ("w", "{o} = torch.zeros(C, dtype=F64); {o}[{y}] += 1"),
    ("w", "{o} = torch.zeros(C); {o}.scatter_add_(0, {y}, torch.ones(len({y}))); {o} = {o}.double()"),
    ("w", "{o} = torch.zeros(C, dtype=torch.long); {o}.put_({y}, {y} * 0 + 1, accumulate=True); {o} = {o} + 1.0"),
    ("t", "{o} = torch.zeros(C, C, dtype=F64); {o}.index_put_(({y}, {z}.argmax(1)), {c} * torch.ones(1, dtype=F64))"),
    ("t", "{o} = {t}.clone(); {o}.diagonal().index_fill_(0, {y}, {c})"),
    ("t", "{o} = {t} * 1.0; {o}[{y}] = {z}.detach()[0] * 0 + {c}"),
    # loops
    ("w", "{o} = torch.zeros(C, dtype=F64)\nfor i in range(len({y})): {o}[{y}[i]] += 1"),
    ("w", "{o} = torch.zeros(C, dtype=F64)\nfor i, k in enumerate({y}): {o}[k] += {v}[i].detach()"),
    ("w", "{o} = torch.stack([{v}[{y} == k].sum() for k in range(C)])"),
    ("w", "{o} = torch.stack([{v}[{y} == k].mean() if ({y} == k).any() else {v}.sum() * 0 for k in range(C)])"),
    ("t", "{o} = torch.zeros(C, C, dtype=F64)\nfor a, b in zip({y}, {z}.argmax(1)): {o}[a, b] += 1"),
    ("t", "{o} = torch.ones(C, C, dtype=F64)\nfor k in {y}: row = {o}[k]; row *= 0.9"),
    ("z", "{o} = {z}.clone()\nfor i in range(len({y})): {o}[i, {y}[i]] *= {c}"),
    ("v", "{o} = torch.stack([-{z}[i, k] for i, k in enumerate({y})])"),
    ("v", "{o} = torch.stack([-{z}[i, k] for i, k in enumerate({y}.tolist())])"),
    ("l", "{o} = 0.0\nfor i in range(len({y})):\n    if {y}[i] != {k}: {o} = {o} + {v}[i]\n{o} = {v}.sum() * 0 + {o}"),
    ("l", "{o} = sum({v}[{y} == k].pow(2).sum() for k in set({y}.tolist())) + {v}.sum() * 0"),
    ("l", "{o} = {l} + 3\nwhile {o} > {c} + 1: {o} = {o} * 0.7"),
    # numpy and the host
    ("w", "{o} = torch.from_numpy(np.bincount({y}.numpy(), minlength=C) + 1.0)"),
    ("v", "{o} = {v} * torch.from_numpy(np.asarray({y}) * 1.0)"),
    ("v", "{o} = {v} * torch.tensor([1.0 if k == {k} else {c} for k in {y}.tolist()], dtype=F64)"),
    ("y", "{o} = torch.tensor([(k * 2) % C for k in {y}.tolist()])"),
    ("y", "{o} = torch.as_tensor(np.where({m}.numpy(), {y}.numpy(), {k}))"),
    ("a", "{o} = {l}.item()"),
    ("a", "{o} = float({v}.mean())"),
    ("a", "{o} = int({m}.sum()) + 1"),
    ("a", "{o} = len(set({y}.tolist()))"),
    ("a", "{o} = {z}[{m}].shape[0] + 1.0"),
    ("a", "{o} = {y}.unique().numel()"),
    ("l", "{o} = {l} * {a}"),
    ("l", "{o} = {v}.sum() / (abs({a}) + 1)"),
    # branches
    ("l", "{o} = {l} * 2 if {l} > {c} else {l}.pow(2)"),
    ("l", "{o} = {l} * 2 if {a} > {c} else {l}.sin()"),
    ("l", "{o} = {l}\nif {m}.any() and not {m}.all(): {o} = {l} + {v}[{m}].mean()"),
    ("l", "{o} = {l} if {l} < {l} * {c} + {v}.mean() else {v}.pow(2).mean()"),
    ("l", "{o} = max({l}, {v}.mean())"),
    ("l", "{o} = min({l}, {v}.mean(), {l} * 0 + {c})"),
    ("l", "{o} = {l} * {c} if {l}.item() < {v}.mean().item() else {l}.cos()"),
    ("l", "try:\n    assert {l} < {c}\n    {o} = {l} * 3\nexcept AssertionError:\n    {o} = {l} + 1"),
    ("l", "{o} = torch.where({l} < {v}.sum(), {l}, {v}.sum())"),
    # sorting, unique
    ("l", "{o} = {v}.sort().values[2:].mean()"),
    ("l", "{o} = {v}.topk(3).values.sum()"),
    ("l", "{o} = {v}.median()"),
    ("l", "{o} = sum(sorted({v})[:3])"),
    ("l", "{o} = {v}[{v}.argsort()[:4]].mean()"),
    ("v", "{o} = {v}[{y}.argsort(stable=True)]"),
    ("l", "{o} = ({v}[{y}.argsort(stable=True)] * torch.linspace(0, 1, len({y}), dtype=F64)).sum()"),
    ("l", "{o} = (torch.unique({y}, return_counts=True)[1] ** 2).sum() * {l}"),
    # results and gradients
    ("l", "{o} = {v}.mean()"),
    ("l", "{o} = {v}[{m}].sum()"),
    ("l", "{o} = F.cross_entropy({z}, {y}, ignore_index={k})"),
    ("l", "{o} = F.cross_entropy({z}, {y}, {w}.detach().abs() + 0.1)"),
    ("l", "{o} = F.nll_loss({z}.log_softmax(1), {y})"),
    ("l", "{o} = F.multi_margin_loss({z}, {y})"),
    ("l", "{o} = F.kl_div({z}.log_softmax(1), F.one_hot({y}, C).double() * 0.9 + 0.02, reduction='batchmean')"),
    ("l", "{o} = F.binary_cross_entropy_with_logits({z}, F.one_hot({y}, C).double())"),
    ("l", "{o} = F.cross_entropy({z}[{m}], {y}[{m}], reduction='sum')"),
    ("l", "{o} = ({t} ** 2).mean() + {l}"),
    ("l", "{o} = {w}.var() + {l}"),
    ("l", "{o} = torch.autograd.grad({v}.sum(), {z0}, create_graph=True)[0].pow(2).sum()"),
    ("z", "{o} = torch.autograd.grad({v}.pow(2).sum(), {z0}, create_graph=True)[0]"),
    ("z", "{o} = {z0} - 0.1 * torch.autograd.grad({v}.pow(2).sum(), {z0}, retain_graph=True)[0]"),
    ("v", "{o} = torch.vmap(lambda a, b: a.gather(0, b[None]).sum())({z}, {y})"),
    ("v", "{o} = Twice.apply({v})"),
    ("v", "{o} = {v} * 1; {o}.register_hook(lambda g: g * 0.5)") ,
    # state of the module
    ("l", "self.counts[{y}] += 1; {o} = (self.counts[{y}] * {v}).mean()"),
    ("l", "self.counts += F.one_hot({y}, C).sum(0); {o} = ({v} / self.counts[{y}]).sum()"),
    ("l", "self.counts = self.counts * 0.9 + torch.bincount({y}, minlength=C); {o} = (self.counts[{y}] * {v}).mean()"),
    ("l", "self.number += 1; {o} = {l} * self.number"),
    ("l", "self.table[{y}, {z}.argmax(1)] = {c}; {o} = self.table.sum() * {l}"),
    ("l", "self.history.append({l}.detach()); {o} = {l} - sum(self.history) / len(self.history)"),
    ("l", "self.history.append({l}.item()); {o} = {l} * float(self.history[-1])"),
    ("l", "self.bank.copy_({t}.detach()); {o} = (self.bank[{y}] * {z}).mean()"),
    # random numbers
    ("v", "{o} = F.dropout({v}, 0.5)"),
    ("v", "{o} = {v} * torch.rand(len({y}), dtype=F64)"),
    ("z", "{o} = {z} + torch.randn_like({z}) * {c}"),
    ("y", "{o} = torch.where(torch.rand(len({y})) < 0.3, {k}, {y})"),
    ("l", "{o} = {l} * random.random()"),
]  # fmt: skip


def program(seed):
    """The source of `step(self, z0, y0)`, which returns a loss."""
    rng = random.Random(seed)
    kinds = {"z": ["z0"], "y": ["y0", "y0"], "v": ["v0"], "m": ["m0"], "w": ["w0"], "t": ["t0"], "a": [], "l": ["l0"]}
    lines = [
        "v0 = F.cross_entropy(z0, y0, reduction='none')",
        "l0 = v0.mean()",
        "m0 = y0 != 1",
        "w0 = torch.linspace(0.5, 2, C, dtype=F64)",
        "t0 = torch.linspace(-1, 1, C * C, dtype=F64).view(C, C)",
    ]
    for number in range(1, rng.randint(3, 9)):
        kind, source = rng.choice(STATEMENTS)
        if "{a}" in source and not kinds["a"]:
            continue
        name = f"{kind}{number}"
        fields = {"o": name, "c": round(rng.uniform(-1, 2), 2), "k": rng.randrange(CLASSES), "z0": "z0"}
        for other, names in kinds.items():
            if names:  # the newest, more often than not
                fields[other] = names[-1] if rng.random() < 0.6 else rng.choice(names)
        lines += source.format(**fields).split("\n")
        kinds[kind].append(name)
    terms = [f"{name} * {round(rng.uniform(0.1, 1), 2)}" for name in rng.sample(kinds["l"][1:], len(kinds["l"]) - 1)]
    terms += [f"({name} ** 2).mean()" for kind in "zvwt" for name in kinds[kind][1:]] + ["l0"]
    terms += [f"(v0 * {name}).mean()" for kind in "my" for name in kinds[kind][-1:]]
    total = " + ".join(terms)
    lines.append(rng.choice([f"return {total}", f"return ({total}).tanh()", f"s = {total}\nreturn s * s.sigmoid()"]))
    body = "\n".join(line for part in lines for line in part.split("\n"))
    return "def step(self, z0, y0):\n" + "\n".join(f"    {line}" for line in body.split("\n")) + "\n"
