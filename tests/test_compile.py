"""torch.compile of the blocks: one graph each, one variant per level, nothing recompiled later, the same function."""
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from nanochat.distributed import compile_blocks


def test_one_variant_per_level_and_no_recompile(hybrid, tokens):
    x, y = tokens[:, :12], tokens[:, 1:13]
    want, _ = hybrid(x, y, widths="normal")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
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
