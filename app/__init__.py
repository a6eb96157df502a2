"""The workbench: Streamlit pages that ask lbllm and draw what it answers. No tensor arithmetic here."""
