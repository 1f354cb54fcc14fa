"""What can be refused before hours of training: answer words, lengths, projections and layers, by the model at hand."""

from __future__ import annotations

from recbole_llm.adapter.personalized import checked_layers
from recbole_llm.adapter.targets import stand_in
from recbole_llm.backbone.loader import Backbone
from recbole_llm.config.configurator import SAVED_RUN, Config
from recbole_llm.data.prompts.ctr import PromptBuilder
from recbole_llm.data.prompts.lines import LinePrompts
from recbole_llm.data.prompts.next_item import TitlePromptBuilder
from recbole_llm.data.prompts.stream import StreamPrompts
from recbole_llm.data.prompts.title_stream import TitleStreamPrompts
from recbole_llm.experiment.splits import Splits
from recbole_llm.utils.causal_lm import position_limit


def check_adapter(config: Config, backbone: Backbone) -> None:
    """The projections and layers that are to be adapted must be there.

    Raises:
        ValueError: naming what the model has.
    """
    strict = config.origins.get("target_modules", SAVED_RUN) != SAVED_RUN
    stand_in(backbone.model, config["target_modules"], strict=strict)
    if config["lora_layers"] is not None:
        checked_layers(backbone.model, config["lora_layers"])


def check_prompts(
    config: Config,
    backbone: Backbone,
    prompts: PromptBuilder | TitlePromptBuilder | StreamPrompts | TitleStreamPrompts,
    splits: Splits,
) -> None:
    """Answers that the tokenizer can tell apart, and prompts that fit into ``max_prompt_tokens`` and the model.

    Raises:
        ValueError: naming the words, or the length that is possible.
    """
    if isinstance(prompts, PromptBuilder):
        _ = prompts.answer_ids
    behind = 0
    if isinstance(prompts, (TitlePromptBuilder, TitleStreamPrompts)):
        longest = max(len(ids) for ids in prompts.answers)  # its last token is only ever predicted
        behind = max(longest - 1, config["max_new_tokens"] if config["generate"] else 0)
    limit = position_limit(backbone.model)
    if limit is not None and config["max_prompt_tokens"] + behind > limit:
        raise ValueError(
            f"max_prompt_tokens: {config['max_prompt_tokens']}, but {backbone.name} has {limit} learned positions for "
            f"the prompt and {behind} tokens of an answer: set max_prompt_tokens to at most {limit - behind}, or use a "
            "backbone with a longer context"
        )
    if isinstance(prompts, LinePrompts):
        for samples in (splits.train, splits.valid, splits.test):
            prompts.check_length(samples.inter_feat)
