"""All metadata is in setup.cfg; this file is what setuptools needs to find it."""

from setuptools import setup

setup()
