"""Several networks into one; small into large."""

from wellread.catalog import chapter

chapter(__name__)
