"""The embedded checkpoint `tiny-gpt-oss`, the data sets beside it, and the script that makes both (`make.py`)."""
