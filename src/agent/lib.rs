//! Room of the house; see the map in README.md.
