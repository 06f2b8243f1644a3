"""One file per method that measures the paper's claim on real data. `make bench NAME=model_soup` runs one; results/*.json are committed."""
