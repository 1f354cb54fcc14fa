"""recbole_llm: LLM recommenders that run as RecBole models do."""

from importlib.util import find_spec

from recbole_llm.utils.quick_start_loader import install_finder

__version__ = "0.1.0"

if find_spec("recbole") is None:
    raise ImportError(
        "recbole_llm extends RecBole 1.2.1, which is not installed. Install it with\n"
        "    pip install --no-deps recbole==1.2.1\n"
        "(--no-deps because its metadata pins ray<=2.6.3, which has no wheels for Python 3.12 and later and "
        "serves only RecBole's own hyper-parameter search; recbole_llm lists what RecBole really needs)."
    )

install_finder()
