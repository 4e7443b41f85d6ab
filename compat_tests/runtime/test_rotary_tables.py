"""A position's cosines and sines are the same bits whoever is beside it, and transformers' own."""

import torch

from compat_tests.tiny_models import TINY_MODELS, make_model
from helix_gateway.runtime.rotary import RotaryTable, install_rotary_tables


def looked_up(table, x, positions, *kind):
    table.reserve(max(positions) + 1)
    return torch.stack(table(x, torch.tensor([positions]), *kind))


def test_every_rotary_embedding_of_a_model_becomes_a_table_once():
    _, model = TINY_MODELS["gemma3"](0)
    assert len(install_rotary_tables(model, 512)) == 1
    assert install_rotary_tables(model, 512) == ()
    _, model = TINY_MODELS["gpt2"](0)
    assert install_rotary_tables(model, 512) == ()


def test_a_position_is_the_same_bits_whoever_is_beside_it():
    _, model = TINY_MODELS["llama"](0)
    x = torch.zeros(1, 1, 64)
    plain = model.model.rotary_emb
    table = RotaryTable(plain, 512)
    wanted = torch.stack(plain(x, torch.arange(300)[None]))
    torch.testing.assert_close(looked_up(table, x, list(range(300))), wanted)
    one = looked_up(table, x, [299])
    for company in ([0, 299], [5, 299, 17, 4], list(range(300))):
        assert torch.equal(looked_up(table, x, company)[:, :, company.index(299)], one[:, :, 0])


def test_a_table_that_grew_keeps_its_beginning():
    _, model = TINY_MODELS["llama"](0)
    x, table = torch.zeros(1, 1, 64), RotaryTable(model.model.rotary_emb, 2000)
    before = looked_up(table, x, [3, 200])
    looked_up(table, x, [1999])
    assert torch.equal(looked_up(table, x, [3, 200]), before)


def test_layer_types_and_dtypes_have_tables_of_their_own():
    _, model = TINY_MODELS["gemma3"](0)
    (table,) = install_rotary_tables(model, 512)
    x = torch.zeros(1, 1, 64)
    local, far = looked_up(table, x, [40], "sliding_attention"), looked_up(table, x, [40], "full_attention")
    assert not torch.equal(local, far)
    assert looked_up(table, x.bfloat16(), [40], "full_attention").dtype == torch.bfloat16
    assert torch.equal(looked_up(table, x, [40], "full_attention"), far)


def test_a_regime_that_changes_beyond_the_context_never_shows():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
    }
    options = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "vocab_size": 64,
        "intermediate_size": 64,
    }
    _, model = make_model("llama", {**options, "max_position_embeddings": 128, "rope_parameters": rope}, 0)
    x, plain = torch.zeros(1, 1, 64), model.model.rotary_emb
    short = torch.stack(plain(x, torch.arange(32)[None]))
    assert not torch.equal(torch.stack(plain(x, torch.arange(64)[None]))[:, :, :32], short)
    torch.testing.assert_close(looked_up(RotaryTable(plain, 32), x, list(range(32))), short)
