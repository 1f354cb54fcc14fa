"""The lens: a conventional RecBole model, trained on all samples, then frozen and read by the LLM's gates."""

from recbole_llm.utils import recbole_repairs

with recbole_repairs.anomaly_detection_kept():  # importing RecBole's sequential models switches it on
    import recbole.model.sequential_recommender  # noqa: F401
