"""The lens: a recommender of RecBole, trained on all rows, then frozen and read by the LLM's gates.

>>> lens = fit_lens(config, train, valid, cache_dir=cache)       # doctest: +SKIP
>>> state, logit = lens.represent(interaction)                   # doctest: +SKIP
"""

from recbole_llm import compat

with compat.anomaly_detection_kept():  # importing RecBole's sequential models switches it on
    from recbole_llm.lens.din import LensDIN
    from recbole_llm.lens.fit import fit_lens, lens_folder
    from recbole_llm.lens.lens import Lens, LensError
    from recbole_llm.lens.next_item import NextItemSequence, next_item
    from recbole_llm.lens.sequence import LabelledSequence, LensSASRec, labelled

__all__ = [
    "LabelledSequence",
    "Lens",
    "LensDIN",
    "LensError",
    "LensSASRec",
    "NextItemSequence",
    "fit_lens",
    "labelled",
    "lens_folder",
    "next_item",
]
