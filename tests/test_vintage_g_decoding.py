"""The tests of decoding and of growth, of models of vintage G; see test_vintage_g.py."""
# ruff: noqa: F401
import pytest
from test_confidence_probe import (
    test_a_prompt_goes_as_deep_as_what_follows_it_and_no_deeper,
    test_decoding_equals_the_parallel_form_with_the_same_decisions,
    test_rows_are_independent,
)
from test_engine import (
    test_a_full_context_slides_on_request,
    test_a_row_draws_the_same_whatever_is_beside_it,
    test_base_models_generate_too,
    test_depth_equals_the_parallel_form,
    test_greedy_decode_equals_recomputation,
    test_ragged_batch_equals_single_rows_token_for_token,
)
from test_speculative import (
    test_base_models_and_bf16_draft_too,
    test_every_draft_gives_the_tokens_of_plain_greedy_decoding,
    test_rounds_that_keep_all_some_or_nothing,
    test_the_contexts_end_and_the_answers_end_inside_a_draft,
)
from test_surgery import (
    config,
    model,
    test_every_new_entry_learns_and_old_gradients_are_as_before,
    test_growth_is_exact_at_every_width,
)
from test_vintage_g import base_config

pytestmark = pytest.mark.slow
