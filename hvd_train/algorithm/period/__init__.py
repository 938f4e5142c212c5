"""When the ranks are averaged: how many local steps each round has."""
