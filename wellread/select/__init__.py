"""Which data is worth learning from."""

from wellread.catalog import chapter

chapter(__name__)
