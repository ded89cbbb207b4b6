"""
What the other test files prove of models like nanochat-d32 (vintage A), proved by the same tests of models that have all
that later nanochats brought (vintage G): this module's `base_config` is what their fixtures build on. Imported names are
collected as tests.
"""
# ruff: noqa: F401
from dataclasses import replace

import pytest
import torch
from conftest import randomize
from test_confidence_probe import (
    test_a_hard_mask_is_the_slice,
    test_a_prompt_that_waits_survives_what_happens_to_a_cache,
    test_deferred_memory_survives_what_happens_to_a_cache,
    test_the_cost_of_many_tokens_is_that_of_each,
)
from test_elastic import (
    test_an_exited_token_keeps_its_state_and_still_writes_memory,
    test_going_back_is_as_never_having_gone_on,
    test_gradients_flow_through_mixed_widths_and_stay_finite,
    test_parallel_form_equals_decode,
    test_ragged_rows_equal_single_rows,
    test_row_widths_equal_separate_rows,
    test_rows_come_and_go,
)
from test_hybrid import (
    test_all_that_insertion_added_learns_from_the_start,
    test_cached_decode_equals_the_parallel_form,
    test_extracted_equals_sliced,
    test_gradients_of_a_slice_equal_the_extracted_models,
    test_insertion_in_double_is_exact,
    test_insertion_keeps_the_function,
)
from test_speculative import (
    test_finishing_exited_tokens_is_never_having_exited,
    test_what_a_dropped_draft_owed_is_forgotten,
)
from test_surgery import (
    config,
    model,
    test_a_chain_of_growths_is_exact,
    test_a_streamed_model_is_the_model,
    test_growth_is_exact_with_shared_kv_heads_and_without_value_embeddings,
)

from nanochat.checkpoint_manager import build_model
from nanochat.gpt import GPTConfig


@pytest.fixture
def base_config():
    gate = tuple(torch.randn(24, generator=torch.Generator().manual_seed(5)).tolist())
    return GPTConfig(sequence_len=64, vocab_size=300, n_layer=3, n_head=4, n_kv_head=4, n_embd=64, rope_base=1e5,
                     softcap=20.0, qk_scale=1.2, windows=(5, 9, 0), x0_lambdas=(0.3, -0.2, 0.25), smear_gate=gate,
                     smear_lambda=0.6, backout_lambda=0.25, value_embeds=True)


@torch.no_grad()
def test_a_backout_of_more_than_all_turns_no_early_exit_round(hybrid_config, tokens):
    """
    Tokens that leave before the middle, or in it, leave as they would without a backout; among others that go on, too.
    Folding a checkpoint's residual lambdas can make its backout larger than 1.
    """
    models = [randomize(build_model(replace(hybrid_config, backout_lambda=share))) for share in (1.2, 0.0)]
    models[1].load_state_dict(models[0].state_dict())
    block = models[0].config.backout_block
    early = torch.randint(1, block + 1, tokens.shape, generator=torch.Generator().manual_seed(2))
    mixed = early.where(torch.rand(tokens.shape, generator=torch.Generator().manual_seed(3)) < 0.5, models[0].config.n_block)
    for exits in (1, block, early):
        with_backout, without = (m.hidden(tokens, exits=exits) for m in models)
        assert torch.equal(with_backout, without)
    with_backout, without = (m.hidden(tokens, exits=mixed) for m in models)
    left = mixed <= block
    assert torch.allclose(with_backout[left], without[left], atol=1e-6)
    assert (with_backout[~left] - without[~left]).abs().max() > 0.1
