"""Why did it say that."""

from wellread.catalog import chapter

chapter(__name__)
