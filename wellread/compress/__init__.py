"""The same network, smaller."""

from wellread.catalog import chapter

chapter(__name__)
