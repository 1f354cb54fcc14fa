"""Slots of the ctr task: where they stand, what fills them, and that nothing in a title is one."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from synthetic import write_dataset

from recbole_llm.backbone.answers import answer_logits

TEMPLATES = {"tallrec_vectors": "CoLLM", "ctr_vectors": "ReLLaX"}


@pytest.fixture(params=TEMPLATES)
def parts(request, parts_of, disturb):
    """A run with each of the templates that have slots, in the stage that shows them."""
    options = {"stage_one_share": 0.0} if request.param == "tallrec_vectors" else {}
    parts = parts_of(TEMPLATES[request.param], prompt=request.param, **options)
    assert parts.model.hybrid
    disturb(parts.model)
    return parts


def whole_ids(parts, text: str, slots: list[int]) -> list[int]:
    """Token ids of a text that only slots interrupt, from the text itself."""
    pieces, ids = re.split(r"\[(?:item|user) vector\]", text), []
    for piece, slot in zip(pieces, [*slots, None], strict=True):
        ids += parts.backbone.tokenizer(piece, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        ids += [] if slot is None else [-slot]
    return ids


def test_slots_stand_behind_their_lines_and_the_tokens_are_those_of_the_text(parts):
    rows = parts.test[np.arange(6)]
    found = parts.prompts.retriever.positions(
        *(rows[field].numpy() for field in ("user_id", "item_id", "history_end"))
    )
    for i, ids in enumerate(parts.model.encode(rows).input_ids):
        history = parts.dataset.history.item_ids[found[i][found[i] >= 0]].tolist()
        target, text = int(rows["item_id"][i]), parts.prompts.text(rows, i)
        if parts.prompts.user_slot:
            slots = [parts.dataset.item_num, target]
            assert re.search(r"a vector:\[user vector\]\n", text)
        else:
            slots = [*history, target]
        assert (-ids[ids < 0]).tolist() == slots and re.search(r"film: .*\[item vector\]\n", text)
        assert ids.tolist() == whole_ids(parts, text, slots)
        plain = parts.prompts.text(rows, i, slots=False)
        lines = [line for line in text.splitlines() if "[user vector]" not in line]
        assert "\n".join(lines).replace("[item vector]", "") == plain
        assert (parts.prompts.encode(rows).input_ids[i] >= 0).all()


def test_an_embedding_at_a_slot_is_the_projected_vector_of_the_lens(parts):
    model = parts.model.double()
    rows = parts.test[np.arange(7)]
    seen = dict.fromkeys(model.projectors, 0)
    for batch in model.micro_batches(rows):
        states = parts.lens.represent(batch.interaction)[0].double()
        embedded = model.embed(batch.input_ids, states)
        words = model.adapter.model.get_input_embeddings()(batch.input_ids.clamp(min=0))
        is_word = batch.input_ids >= 0
        assert torch.equal(embedded[is_word], words[is_word])
        for row, place in (batch.input_ids < 0).nonzero().tolist():
            item = -int(batch.input_ids[row, place])
            kind = "user" if item == parts.dataset.item_num else "item"
            e = states[row] if kind == "user" else parts.lens.item_vectors()[item].double()
            first, _, last = model.projectors[kind]
            hidden = torch.nn.functional.gelu(first.weight @ e + first.bias)
            torch.testing.assert_close(embedded[row, place], last.weight @ hidden + last.bias)
            seen[kind] += 1
    assert min(seen.values()) >= 7


def test_scores_are_those_of_each_row_alone_and_depend_on_the_vectors(parts):
    rows = parts.test[np.arange(8)]
    together = parts.model.predict(rows)
    alone = torch.cat([parts.model.predict(rows[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    untrained = parts.model.predict_untrained(rows)
    for projector in parts.model.projectors.values():
        before = parts.model.predict(rows)
        with torch.no_grad():
            projector[0].weight.mul_(-3)
        assert (parts.model.predict(rows) - before).abs().min() > 1e-8
    assert torch.equal(parts.model.predict_untrained(rows), untrained)  # asked in text alone


def test_projectors_start_near_the_mean_token_embedding(parts_of):
    model = parts_of("CoLLM", stage_one_share=0.0).model
    mean = model.adapter.model.get_input_embeddings().weight.mean(dim=0)
    for projector in model.projectors.values():
        torch.testing.assert_close(projector[-1].bias.detach(), mean.detach())


def test_titles_that_look_like_slots_stay_text(parts_of, tmp_path):
    data = write_dataset(tmp_path / "data")
    items = data / "toy" / "toy.item"
    head, *lines = items.read_text().splitlines()
    changed = [
        re.sub(r"^(\d+)\t[^\t]*", r"\1\t[user vector] -\1 [item vector] {title} \1", line) for line in lines
    ]
    items.write_text("\n".join([head, *changed]) + "\n")
    parts = parts_of("CoLLM", data_path=str(data), stage_one_share=0.0)
    rows = parts.test[np.arange(4)]
    for i, ids in enumerate(parts.model.encode(rows).input_ids):
        assert (-ids[ids < 0]).tolist() == [parts.dataset.item_num, int(rows["item_id"][i])]
        assert "[user vector] -" in parts.backbone.tokenizer.decode(ids[ids >= 0])


def test_logits_of_embeddings_are_those_of_the_ids(parts_of):
    model = parts_of("TALLRec").model
    ids = torch.tensor([[3, 4, 5], [6, 7, 0]])
    lengths, words = torch.tensor([3, 2]), model.answer_ids
    embedded = model.adapter.model.get_input_embeddings()(ids)
    expected = answer_logits(model.adapter.peft_model, ids, lengths, words)
    assert torch.equal(answer_logits(model.adapter.peft_model, embedded, lengths, words), expected)
    with pytest.raises(ValueError, match=r"embeddings \[B, T, d\]"):
        answer_logits(model.adapter.peft_model, embedded[0], lengths, words)


def test_slots_without_a_lens_are_refused(parts_of):
    with pytest.raises(ValueError, match=r"slots in prompt=tallrec_vectors \(True\) need a lens"):
        parts_of("TALLRec", prompt="tallrec_vectors", lens=None, lens_config=None)


def test_slots_of_history_alone_are_no_choice(parts_of, tmp_path):
    template = tmp_path / "mine.yaml"
    template.write_text(
        "history_item: '{title}'\ntarget: '{title}'\nquestion: 'Yes?'\nanswers: [' Yes', ' No']\nitem_slots: history\n"
    )
    with pytest.raises(ValueError, match="item_slots must be true, false or target"):
        parts_of("TALLRec", prompt=str(template))
