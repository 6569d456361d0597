"""Refreshes: releases of tables and dense weights, noticed and swapped in while the server runs."""
