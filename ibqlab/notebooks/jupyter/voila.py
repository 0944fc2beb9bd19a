"""How JupyterLab shows notebooks without code, once JUPYTER_CONFIG_PATH names this folder."""

from ibqlab.notebooks.app import configure

configure(c)
