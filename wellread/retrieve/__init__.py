"""Search by meaning, and the pre-training behind it."""

from wellread.catalog import chapter

chapter(__name__)
