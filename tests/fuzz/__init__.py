"""Change valid files of every kind as a hostile or a broken disk would, and open them under limits.

    pytest tests/fuzz               a few of each kind, as in every run of the tests
    pytest tests/fuzz -m slow       the long one: 20,000 caches, 500 to 1,000 of each other kind

Both make the same files every time. `mutations` changes bytes and JSON, and computes guards and checksums anew, so that
a change reaches the code behind them; `kinds` says what the files are and how they are opened; `guard` is the limits.
"""
