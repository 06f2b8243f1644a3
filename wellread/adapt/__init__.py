"""Learn a new task from little."""

from wellread.catalog import chapter

chapter(__name__)
