"""A small dataset in RecBole's atomic files, made on the spot: users like two genres, ratings follow."""

from __future__ import annotations

from pathlib import Path

import numpy as np

GENRES = ("Drama", "Comedy", "Horror", "Western")
TEXT = {
    "title": "movie_title",
    "year": "release_year",
    "genre": "class",
    "user_fields": {"gender": "{}", "age": "aged {}"},
    "noun": "film",
    "user": "viewer",
    "rating_unit": "stars",
    "placeholder": "Item",
}
"""The ``text`` section of this dataset's configuration."""
WORDS = ("River", "Night", "Stone", "Garden", "Winter", "Letter", "Bridge", "Mirror", "Harvest", "Signal")


def write_dataset(
    folder: Path, name: str = "toy", n_users: int = 40, n_items: int = 50, length: int = 25
) -> Path:
    """Write ``folder/name/name.{inter,item,user}``; returns ``folder``, the ``data_path`` to configure."""
    rng = np.random.default_rng(7)
    target = folder / name
    target.mkdir(parents=True)
    genre = rng.integers(len(GENRES), size=n_items)
    taste = rng.random((n_users, len(GENRES)))
    inter = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(n_users):
        start = 880_000_000 + int(rng.integers(0, 500_000))
        for step, item in enumerate(rng.permutation(n_items)[:length]):
            rating = int(np.clip(np.round(1 + 4 * taste[user, genre[item]] + rng.normal(0, 0.5)), 1, 5))
            inter.append(
                f"{user + 1}\t{item + 1}\t{rating}\t{start + step // 2 * 100_000}"
            )  # pairs of equal timestamps
    items = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    for item in range(n_items):
        title = f"{WORDS[item % 10]} {WORDS[(item * 7 + item // 10) % 10]}"
        title = f"{title}, The" if item % 5 == 0 else title
        items.append(f"{item + 1}\t{title}\t{1950 + item}\t{GENRES[genre[item]]}")
    users = ["user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"]
    for user in range(n_users):
        users.append(
            f"{user + 1}\t{20 + user}\t{'MF'[user % 2]}\t{('writer', 'student')[user % 2]}\t{10000 + user}"
        )
    for suffix, lines in (("inter", inter), ("item", items), ("user", users)):
        (target / f"{name}.{suffix}").write_text("\n".join(lines) + "\n")
    return folder
