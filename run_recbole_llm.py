"""Run one model on one dataset, as RecBole's run_recbole.py does. See README.md."""

from recbole_llm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
