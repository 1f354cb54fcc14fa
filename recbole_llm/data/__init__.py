"""From atomic files to labelled samples, histories, candidates and token ids."""
