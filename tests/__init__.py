"""The tests: unit, integration (one real server), acceptance (real servers, clients, kills)."""
