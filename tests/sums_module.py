"""The text of a file as somebody writes it: a module, a number of it, and a task."""

from __future__ import annotations


def sums_module(p: int, embedded: int, hidden: int) -> str:
    """Of sums modulo `p`: `build`, `loss`, the task `Pairs`.

    Args:
        embedded, hidden: widths of the module.
    """
    return f'''
"""Sums modulo {p}, two numbers in, logits out: no task of circuit, no HookedTransformer."""

import torch
from torch import nn

import circuit
from circuit.tasks.base import Drawn, Parsed, Question, Record, Task, TaskConfig, Vocabulary

p = {p}
pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
sums = pairs.sum(1) % p


def build():
    torch.manual_seed(0)
    hidden = [nn.Linear({2 * embedded}, {hidden}), nn.Tanh(), nn.Linear({hidden}, p)]
    return nn.Sequential(nn.Embedding(p, {embedded}), nn.Flatten(), *hidden)


def loss(module, factor: float = 1.0):
    return factor * nn.functional.cross_entropy(module(pairs), sums)


class PairsConfig(TaskConfig):
    def stored(self):
        return {{"sums": (p * p, 3)}}


class Pairs(Task):
    Config = PairsConfig
    kinds = ("first", "second", "answer")
    facts = {{"first_pos": False}}
    roles = {{"prediction": "at", "first": "first_pos"}}
    pair_types = {{}}
    token_set_names = ("number",)
    support = "first"
    loss = "answer"

    def __init__(self, config, facts=None):
        super().__init__(config)
        self.vocabulary = Vocabulary(list(map(str, range(p))))
        self.choices = range(p)
        self.token_sets = {{"number": self.choices}}
        self.split_names = ("all",)

    def draw(self, report):
        rows = zip(pairs.tolist(), sums.tolist())
        return Drawn({{"all": [Record(f"{{a}}+{{b}}", "all", (a, b, c)) for (a, b), c in rows]}})

    def parse(self, record, through=None):
        return Parsed([Question(0, 1, record.tokens[2], {{"first_pos": 0}}, record)], range(3))
'''
