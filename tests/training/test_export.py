"""What training writes is an ordinary Hugging Face directory, and plain transformers computes the same with it."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from training import weights
from training.evaluate import generate
from training.export import export
from training.model import Decoder, draft_config, rotary_table, target_config, tiny_config
from training.tokenizer import IM_END

VOCAB = 1728  # what the tokenizer's size is rounded up to


def rounded(seed: int = 0) -> Decoder:
    """A tiny model whose weights are exact in bfloat16, large enough that its logits differ, computing in float32."""
    model = Decoder(tiny_config(VOCAB), seed)
    with torch.no_grad():
        model.model.norm.weight.fill_(0.5)
    return model.to(torch.bfloat16).float()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(directory, our model, transformers' model)."""
    directory = tmp_path_factory.mktemp("tiny")
    model = rounded()
    export(directory, model.state_dict(), model.config)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return directory, model, theirs


def logits(model: Decoder, documents: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of packed documents, each [length, V]."""
    lengths = [len(d) for d in documents]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in lengths])
    table = rotary_table(model.config, max(lengths), torch.device("cpu"))[positions]
    hidden = model.hidden(torch.cat(documents), table, starts, torch.tensor([len(lengths), max(lengths)]))
    return list(model.logits(hidden).split(lengths))


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCAB, (n,), generator=generator) for n in (40, 1, 23)]


@torch.no_grad()
def test_logits_are_those_of_transformers(exported):
    _, ours, theirs = exported
    for document, found in zip(documents(), logits(ours, documents()), strict=True):
        wanted = theirs(document[None]).logits[0]
        assert wanted.std() > 0.05, "logits that are all alike would prove nothing"
        torch.testing.assert_close(found, wanted, atol=1e-5 * wanted.abs().max().item(), rtol=1e-4)


def test_free_running_is_that_of_transformers(exported):
    _, ours, theirs = exported
    prompts = [d.tolist() for d in documents()]
    for prompt, found in zip(prompts, generate(ours, prompts, 16), strict=True):
        ids = torch.tensor([prompt])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)
        wanted = out[0, len(prompt) :].tolist()
        assert found == (wanted[: wanted.index(IM_END)] if IM_END in wanted else wanted)


def test_the_directory_is_complete(exported):
    directory, model, theirs = exported
    assert {p.name for p in directory.iterdir()} >= {"config.json", "generation_config.json", "model.safetensors"}
    config = theirs.config
    assert config.architectures == ["Qwen3ForCausalLM"] and config.tie_word_embeddings
    assert config.head_dim == 64 and config.vocab_size == VOCAB and config.eos_token_id == IM_END
    assert sum(p.numel() for p in theirs.parameters()) == model.config.num_parameters()
    assert theirs.generation_config.eos_token_id == IM_END and not theirs.generation_config.do_sample
    assert len(AutoTokenizer.from_pretrained(directory)) <= VOCAB
    stored = json.loads((directory / "config.json").read_text())
    assert stored["torch_dtype"] == "bfloat16" and stored["max_position_embeddings"] == 65536


def test_shards_load_and_replace_older_files(exported, tmp_path, monkeypatch):
    _, model, theirs = exported
    (tmp_path / "model.safetensors").write_bytes(b"of an earlier run")
    monkeypatch.setattr(weights, "MAX_BYTES", 250_000)
    export(tmp_path, model.state_dict(), model.config)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1 and not (tmp_path / "model.safetensors").exists()
    assert all(path.stat().st_size < 260_000 for path in files)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    for name, value in theirs.state_dict().items():
        assert torch.equal(again[name], value), name


def test_a_tensor_too_large_for_a_file_is_refused(monkeypatch):
    monkeypatch.setattr(weights, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="larger than one file may be"):
        weights.shards({"a": torch.zeros(600)})


def test_the_target_fits_its_files():
    """The shipped models have the promised sizes, in files below 16 MB."""
    for config, least, most in ((target_config, 12e6, 15.5e6), (draft_config, 1.5e6, 2.5e6)):
        model = Decoder(config(VOCAB))
        count = sum(p.numel() for p in model.parameters())
        assert count == model.config.num_parameters() and least < count < most
        parts = weights.shards(model.state_dict())
        assert [key for part in parts for key in part] == list(model.state_dict())
        assert all(sum(2 * t.numel() for t in part.values()) < 16_000_000 for part in parts)


def test_runs_are_saved_and_loaded(tmp_path):
    states = {name: rounded(i).to(torch.bfloat16).state_dict() for i, name in enumerate(("035", "050", "065", "100"))}
    weights.save_drafts(tmp_path, states)
    weights.save_target(tmp_path, states["100"])
    for name, state in states.items():
        found = weights.load_draft(tmp_path, name)
        assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)
    target = weights.load_target(tmp_path)
    assert all(torch.equal(target[key], value) for key, value in states["100"].items())
    with pytest.raises(ValueError, match="no snapshot '080'"):
        weights.load_draft(tmp_path, "080")
