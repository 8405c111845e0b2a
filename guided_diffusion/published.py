"""Published models by their names: downloaded once to a cache, and found there afterwards."""


def locate(path):
    return path
