"""Learn on without forgetting; run on endless streams."""

from wellread.catalog import chapter

chapter(__name__)
