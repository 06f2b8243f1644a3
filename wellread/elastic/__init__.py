"""One network that is many: choose the size later."""

from wellread.catalog import chapter

chapter(__name__)
