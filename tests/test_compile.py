"""torch.compile of the blocks: one graph each, a few variants per level, far from the limit, the same function."""
import pytest
import torch
from conftest import randomize
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.testing import CompileCounterWithBackend

from nanochat.checkpoint_manager import build_model
from nanochat.distributed import compile_blocks, shard_model
from nanochat.elastic_step import ElasticStep
from nanochat.gpt import GPTConfig
from nanochat.hybrid_gpt import HybridConfig, MambaBlock
from nanochat.matryoshka import AttentionBlock
from nanochat.stages import set_trained
from nanochat.step_parts import shares

CONFIG = HybridConfig.from_base(GPTConfig(12, 64, 3, 2, 2, 32))  # blocks with and without value embeddings, two levels


@pytest.fixture
def counter(same_start):
    """Counts graphs and compiles nothing; what was compiled before is forgotten, and the limit is as it was afterwards."""
    torch._dynamo.reset()
    dynamo = torch._dynamo.config
    limits = dynamo.recompile_limit, dynamo.accumulated_recompile_limit
    yield CompileCounterWithBackend("eager")
    dynamo.recompile_limit, dynamo.accumulated_recompile_limit = limits
    torch._dynamo.reset()


def test_one_variant_per_level_and_no_recompile(hybrid, tokens, counter):
    x, y = tokens[:, :12], tokens[:, 1:13]
    want, _ = hybrid(x, y, widths="normal")
    compile_blocks(hybrid, backend=counter)  # fullgraph: a graph break would raise
    levels, g = hybrid.config.levels, torch.Generator().manual_seed(0)
    for d in levels:
        hybrid(x, y, widths=d)[0].backward()
    warm = counter.frame_count
    # every level of an attention block with value embeddings, of one without, and of a Mamba block
    assert warm == len(levels) * 3
    for _ in range(200):
        widths = [levels[int(i)] for i in torch.randint(len(levels), (hybrid.config.n_block,), generator=g)]
        hybrid.hidden(x, widths=widths)
    assert counter.frame_count == warm
    got, _ = hybrid(x, y, widths="normal")
    torch.testing.assert_close(got, want)


def test_tokens_of_several_widths_run_uncompiled(hybrid, tokens, counter):
    """Which tokens are how wide is data: no graph could hold it, and none is made."""
    x, y = tokens[:, :12], tokens[:, 1:13]
    levels, g = torch.tensor(hybrid.config.levels), torch.Generator().manual_seed(0)
    widths = levels[torch.randint(len(levels), (*x.shape, hybrid.config.n_block), generator=g)]
    want, _ = hybrid(x, y, widths=widths)
    compile_blocks(hybrid, backend=counter)
    got, _ = hybrid(x, y, widths=widths)
    assert counter.frame_count == 0 and torch.equal(got, want)


def run_steps(counter, recipe, phase, steps: int, **options) -> None:
    """Training steps and evaluations as fractal_train makes them, with gradient checkpointing."""
    model = randomize(build_model(CONFIG))
    set_trained(model, phase, gate=recipe in ("both", "every", "half"))
    shard_model(model, None, torch.float32, gradient_checkpointing=True, compile=True, backend=counter)
    step = ElasticStep(model, 0, steps, recipe, student_every=1, **options)
    for i in range(steps):
        x = torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(i))
        step(i, x, x, shares([x >= 0])[0])
        model.zero_grad()
    with torch.no_grad():
        for mode in CONFIG.distinct_modes:
            model(x, x, widths=mode, reduction="none")


def variants() -> int:
    """Of the kind of block that has the most."""
    return max(len(_debug_get_cache_entry_list(block.forward.__code__)) for block in (AttentionBlock, MambaBlock))


@pytest.mark.slow
@pytest.mark.parametrize("recipe, phase, options", [
    ("lean", "stage 1", {}), ("both", "unfrozen", {}), ("both", "stage 1", {"sample": False, "draft_exit": 2}),
    ("controls value", "controls", {}), ("controls gumbel", "controls", {})])
def test_every_recipe_compiles_whole_and_far_from_the_limit(counter, recipe, phase, options):
    run_steps(counter, recipe, phase, 5, **options)
    assert 0 < variants() <= torch._dynamo.config.recompile_limit / 2
