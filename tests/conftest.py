"""Shared fixtures: small random models whose every weight is non-zero, so that no part of them is a no-op."""
import pytest
import torch

from nanochat.checkpoint_manager import build_model
from nanochat.gpt import GPTConfig
from nanochat.hybrid_gpt import HybridConfig


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the tests marked slow, too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--all"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: runs with --all"))


def randomize(model, seed=0):
    """Initialises, then fills what init_weights leaves at zero, at a scale that keeps activations of order one."""
    torch.manual_seed(seed)
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            if p.abs().max() == 0:
                p.normal_(std=0.3 * p.size(-1) ** -0.5 if p.ndim > 1 else 0.1)
        model.lm_head.weight.normal_(std=0.05)
    return model


def learn(model, rows, steps=60, lr=0.02):
    """Trains a tiny model on rows [(ids, mask)], all in each step; mask 0: read and not learnt."""
    length = max(len(ids) for ids, _ in rows)
    x = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows])
    y = torch.tensor([[t if m else -1 for t, m in zip(ids[1:], mask[1:])] + [-1] * (length - len(ids))
                      for ids, mask in rows])
    optimizer = torch.optim.AdamW(language_parameters(model).values(), lr=lr, weight_decay=0.0)
    for _ in range(steps):
        loss, _ = model(x[:, :-1], y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model


def language_parameters(model):
    """Name -> parameter of all that the language loss trains: everything but the controls."""
    return {n: p for n, p in model.named_parameters() if not n.startswith(("gate.", "predictor."))}


@pytest.fixture
def base_config():
    return GPTConfig(sequence_len=64, vocab_size=300, n_layer=3, n_head=4, n_kv_head=4, n_embd=64)


@pytest.fixture
def hybrid_config(base_config):
    return HybridConfig.from_base(base_config)


@pytest.fixture
def base(base_config):
    return randomize(build_model(base_config))


@pytest.fixture
def hybrid(hybrid_config):
    return randomize(build_model(hybrid_config))


@pytest.fixture
def tokens():
    return torch.randint(300, (2, 48), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def same_start():
    """The same seed for each test; and one thread: on tiny sizes others only wait for each other, long on a busy machine."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
