"""What a finished run recommends, as in RecBole's own run_example/case_study_example.py.

    python examples/case_study_example.py RUN            RUN: the folder of a finished run of any model
    python examples/case_study_example.py RUN 196 186    for these users, by the ids of the data's files

The first part is RecBole's code on a run of this package: users of the test split, at the place of their test samples.
The second part is this package's own call: any user, after everything the data has of him.
"""

from __future__ import annotations

import sys

import numpy as np
from recbole.utils.case_study import full_sort_scores, full_sort_topk

from recbole_llm.quick_start import load_data_and_model
from recbole_llm.serving.recommend import recommend


def main(arguments: list[str]) -> None:
    """Print the best items of some users, twice."""
    if not arguments:
        sys.exit(__doc__)
    folder, *users = arguments
    run = load_data_and_model(folder)
    dataset, model, test_data = run.dataset, run.model, run.test_data
    field, item_field = dataset.uid_field, dataset.iid_field

    tested = np.unique(run.test.inter_feat[field].numpy())
    uid_series = dataset.token2id(field, users) if users else tested[:2]
    uid_series = np.intersect1d(uid_series, tested)  # others have no test sample
    if len(uid_series):
        topk_score, topk_iid_list = full_sort_topk(
            uid_series, model, test_data, k=5, device=run.config["device"]
        )
        external_item_list = dataset.id2token(item_field, topk_iid_list.cpu())
        print("RecBole's full_sort_topk, for every test sample of", *dataset.id2token(field, uid_series))
        for items, scores in list(zip(external_item_list, topk_score.tolist(), strict=True))[:3]:
            print("  ", ", ".join(f"{item} {score:.4f}" for item, score in zip(items, scores, strict=True)))
        scores = full_sort_scores(uid_series, model, test_data, device=run.config["device"])
        print("full_sort_scores:", tuple(scores.shape), "(samples, items)")

    table = recommend(folder, users or dataset.id2token(field, uid_series), top=5)
    print("recbole_llm's recommend, after everything the data has of the users")
    print(table.to_string(index=False))


if __name__ == "__main__":
    main(sys.argv[1:])
